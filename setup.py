"""All but one thing is in pyproject.toml: `optimum` is left out of top_level.txt.

The file that optimum-cli looks for lies in Optimum's namespace, but this distribution is not Optimum: diffusers would
otherwise take our version for its, and say "Multiple distributions found for package optimum" at every import.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    """As usual, without the namespace."""

    def run(self) -> None:
        """Write the metadata."""
        super().run()
        path = Path(self.egg_info, "top_level.txt")
        names = [name for name in path.read_text().split() if name != "optimum"]
        path.write_text("\n".join(names) + "\n")


setup(cmdclass={"egg_info": EggInfo})
