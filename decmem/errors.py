"""The one kind of error a user can cause."""


class UserError(ValueError):
    """A bad input: which argument, what is wrong with it (got and expected), and how to mend it.

    The command line prints ``error: --argument: problem. cure`` in one line and exits with 2.
    """

    def __init__(self, argument: str, problem: str, cure: str) -> None:
        self.argument = argument
        self.problem = problem
        self.cure = cure
        super().__init__(f"{argument}: {problem}. {cure}")
