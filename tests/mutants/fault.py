"""What a fault is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """One slip.

    Attributes:
        file: Of the project.
        before: Text that is in the file once.
        after: What stands there with the fault.
        tests: Files of tests that should notice.
        only: Which of their tests, as pytest's -k; empty: all.
    """

    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    only: str = ""
