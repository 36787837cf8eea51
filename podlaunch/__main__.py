"""`launch`, and `python -m podlaunch`, which is the same."""

from podlaunch import enter_home


def main() -> None:
    enter_home()
    from launcher.cli import main as launch

    launch(prog_name="launch")


if __name__ == "__main__":
    main()
