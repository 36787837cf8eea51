"""What runs on another machine than the user's: the programs of `python -m podlaunch.host`, and `launch worker`."""
