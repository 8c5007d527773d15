"""Load, save and upload the routers of a press. The methods have the names that transformers uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from kvpress_moe.errors import SettingError
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import push_routers, save_routers
from kvpress_moe.routers.resolve import trained_routers


class Pretrained:
    """A press whose routers can be loaded, saved and uploaded."""

    router: str | Path | Routers | None
    routers: Any

    @classmethod
    def from_pretrained(cls, router: str | Path | Routers, **settings: Any) -> Self:
        """
        Make a press with trained routers.

        Parameters
        ----------
        router : path, str or Routers
            A directory, a hub id (``"user/name"``), or the object.
        **settings
            Settings of the press. Experts and ``top_k`` are those of the routers if they are not given.
        """
        return cls(router=trained_routers(router), **settings)  # type: ignore[call-arg]

    def save_pretrained(self, directory: str | Path, metrics: dict[str, Any] | None = None) -> Path:
        """
        Write the routers in use to a directory, see :func:`kvpress_moe.routers.checkpoint.save_routers`.

        Raises
        ------
        SettingError
            If there are no routers yet, because the press has not been used with a model.
        """
        return save_routers(self._routers_in_use(), directory, metrics)

    def push_to_hub(self, repo_id: str, private: bool = False, metrics: dict[str, Any] | None = None) -> str:
        """
        Upload the routers in use to a repository of the Hugging Face hub, and return the address of the repository.

        The repository is created if it does not exist.

        Raises
        ------
        SettingError
            If there are no routers yet, because the press has not been used with a model.
        """
        return push_routers(self._routers_in_use(), repo_id, private, metrics)

    def _routers_in_use(self) -> Routers:
        routers = self.routers if self.routers is not None else self.router
        if not isinstance(routers, Routers):
            raise SettingError("routers", None, "routers in use", "Enter `with press(model):` once, or pass router=.")
        return routers
