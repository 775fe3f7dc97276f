"""``convexhead`` and ``python -m convexhead``: Ctrl-C is heard from here on, the rest takes seconds to import."""

from convexhead.interrupts import interrupts


def main() -> None:
    """Entry point of the command line."""
    with interrupts.watch():
        from convexhead.cli import main as run

        try:
            run()
        finally:
            interrupts.ignore()


if __name__ == "__main__":
    main()
