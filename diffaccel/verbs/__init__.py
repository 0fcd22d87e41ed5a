"""Commands, one module each.

A new command is a module with a text ``HELP`` and a function, and a line in ``VERBS``. See :mod:`diffaccel.verbs.help`
for the form of ``HELP``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A command.

    Attributes:
        name: Name on the command line.
        on_experiment: Whether the words are an experiment and its settings. The function has the name of the command,
            and its argument is the configuration. The function of other commands gets the words.
        settings: Whether keys of an experiment are accepted besides the keys that ``HELP`` lists.
        module: Module below ``diffaccel.verbs``; by default the name of the command.
        function: Function in the module; by default the name of the command.
        help: Name of the help text in the module.
        dry_run: Whether the command has a dry run.
    """

    name: str
    on_experiment: bool = False
    settings: bool = False
    module: str = ""
    function: str = ""
    help: str = "HELP"
    dry_run: bool = False

    @property
    def path(self) -> str:
        """Import path of the module."""
        return f"{__name__}.{self.module or self.name}"


VERBS = {
    verb.name: verb
    for verb in (
        Verb("new", function="new_command"),
        Verb("curve", settings=True, function="curve_command", dry_run=True),
        Verb("bench", on_experiment=True, dry_run=True),
        Verb("fit", on_experiment=True, dry_run=True),
        Verb("train", settings=True, function="train_command", dry_run=True),
        Verb("search", on_experiment=True),
        Verb("tradeoff", on_experiment=True),
        Verb("sweep", settings=True, module="sweeping", function="sweep_command", dry_run=True),
        Verb("compare", module="comparison", function="compare_command"),
        Verb("advise", module="advising", function="advise_command"),
        Verb("convert"),
        Verb("sample", on_experiment=True, dry_run=True),
        Verb("reference", on_experiment=True),
        Verb("score", function="score_command"),
        Verb("export", settings=True, module="exporting", function="export_command"),
        Verb("list", module="listing", function="show_list"),
        Verb("explain", module="listing", function="show_explanation", help="EXPLAIN_HELP"),
    )
}
"""Commands by name, in the order of the overview."""
