"""Networks that are ready to explain: the last used ones stay in memory, each is loaded once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import Generic, TypeVar

import fusion
import lrp
from app import composites
from app.subject import Subject
from fusion.errors import ArtefactError
from models.preprocess import InputSpec
from models.store import Store, Stored

V = TypeVar("V")

_NONE: Mapping[str, float] = MappingProxyType({})


class Engine:
    """Explainers by model, composite and parameters. Safe to use from several threads."""

    def __init__(self, store: Store, device: str, keep: int) -> None:
        self._store = store
        self._device = device
        # Making a network ready runs it on tensors without storage, which torch does one at a time.
        self._building = threading.Lock()
        self._networks: Cache[fusion.Network] = Cache(keep)
        self._explainers: Cache[lrp.Explainer] = Cache(2 * keep)

    def ready(
        self, reference: str, composite: str = composites.DEFAULT, parameters: Mapping[str, float] = _NONE
    ) -> Subject:
        """The network, ready to explain. Raises UnknownModel, BadComposite, ArtefactError."""
        model = self._store.get(reference)
        manifest = model.manifest
        spec = InputSpec.from_json(manifest["input"])
        key = (model.id, model.etag, composite, tuple(sorted(parameters.items())))

        def explainer() -> lrp.Explainer:
            rules = composites.rules(composite, parameters, spec)
            network = self.network(model)
            with self._building:
                # Not strict: a map that does not add up is answered, with a warning (`app.explaining`).
                return lrp.Explainer(network, composite=rules, device=self._device, strict=False)

        labels = manifest.get("labels")
        return Subject(
            model.id,
            spec,
            tuple(labels) if labels else None,
            manifest["classes"],
            self._explainers.get(key, explainer),
        )

    def network(self, model: Stored) -> fusion.Network:
        """The stored network itself."""
        return self._networks.get((model.id, model.etag), lambda: self._load(model))

    def _load(self, model: Stored) -> fusion.Network:
        try:
            return fusion.load(model.folder)[0]
        except ArtefactError:
            present = self._store.get(model.id)  # replaced while it was read?
            if present.folder == model.folder:
                raise
            return fusion.load(present.folder)[0]


class Cache(Generic[V]):
    """The last used values; of several callers that miss the same key, one makes the value and all get it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Future[V]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        with self._lock:
            future = self._values.get(key)
            mine = future is None
            if future is None:
                future = self._values[key] = Future()
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._values.get(key) is future:
                        del self._values[key]
                future.set_exception(error)
        return future.result()
