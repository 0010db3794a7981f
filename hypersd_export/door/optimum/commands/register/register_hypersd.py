"""What `optimum-cli` finds of this project: `optimum-cli export hypersd …` (the folders above have no __init__.py, as
PEP 420's namespaces want it)."""

from optimum.commands.export.base import ExportCommand

from hypersd_export.optimum_command import HypersdExportCommand

REGISTER_COMMANDS = [(HypersdExportCommand, ExportCommand)]
