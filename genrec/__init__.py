"""genrec: a catalogue and an interaction log become a served, LLM-based generative recommender."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__"]

if TYPE_CHECKING:
    from genrec.recommender import Recommender
else:

    def __getattr__(name: str) -> Any:
        """Import `Recommender`, and with it torch, when it is first used."""
        if name == "Recommender":
            from genrec.recommender import Recommender

            return Recommender
        raise AttributeError(f"module 'genrec' has no attribute {name!r}; it offers {__all__}")
