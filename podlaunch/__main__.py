"""The entry point of the `launch` command and of `python -m podlaunch`."""

from podlaunch import enter_home


def main() -> None:
    enter_home()
    from launcher.commands.main import main as launch

    launch(prog_name="launch")


if __name__ == "__main__":
    main()
