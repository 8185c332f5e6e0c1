"""A finished dataset in Python: samples by index, the ledger and caption layers as tables, batches for PyTorch."""

from __future__ import annotations

import base64
import bisect
import functools
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, overload

import duckdb
import pyarrow as pa

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.records import LEDGER_SCHEMA, SHARD_SCHEMA
from capstan.pipeline.storage import Storage
from capstan.recaption import store

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from capstan.torch_batches import TorchBatches

_SHOWN = 12  # images on the contact sheet
_THUMBNAIL = 160  # pixels, longer side
_TABLES = 4  # shard tables held in memory


class Table:
    """A DuckDB relation with pandas and Arrow close at hand: every method of a relation works.

    >>> ds.ledger.filter("outcome = 'failed'").aggregate("reason, count(*)").to_pandas()  # doctest: +SKIP
    """

    def __init__(self, relation: Any, connection: duckdb.DuckDBPyConnection) -> None:
        self.relation = relation
        self._connection = connection  # a relation lives as long as its connection

    def to_pandas(self) -> pd.DataFrame:
        """Return all rows as a DataFrame."""
        return self.relation.df()

    def to_arrow(self) -> pa.Table:
        """Return all rows as an Arrow table."""
        found: Any = self.relation.arrow()
        return found.read_all() if isinstance(found, pa.RecordBatchReader) else found

    def sql(self, query: str) -> Table:
        """Run a query in which this table is named `rows`."""
        return Table(self.relation.query("rows", query), self._connection)

    def __len__(self) -> int:
        return int(self.relation.aggregate("count(*)").fetchall()[0][0])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.relation, name)
        return functools.partial(self._call, value) if callable(value) else value

    def _call(self, method: Any, *args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        return Table(result, self._connection) if isinstance(result, duckdb.DuckDBPyRelation) else result

    def __repr__(self) -> str:
        return repr(self.relation)

    def _repr_html_(self) -> str:
        return str(self.relation.limit(20).df().to_html())


class Funnel(list[dict[str, Any]]):
    """The steps of the selection in order: {step, left, lost}, in rows."""

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(str(s['step']))}</td><td>{s['left']:,}</td></tr>" for s in self)
        return f"<table><tr><th>step</th><th>rows</th></tr>{rows}</table>"


@dataclass(frozen=True)
class Sample:
    """One image of a dataset and what is known of it. The image is read when it is asked for."""

    key: str
    caption: str
    url: str
    width: int  # pixels, as stored
    height: int
    scores: dict[str, float | None]  # column → value
    row: dict[str, Any]  # all columns of the shard's table
    _place: Storage
    _tar: str

    @property
    def jpeg(self) -> bytes:
        """The stored file."""
        offset, size = self.row["offset"], self.row["size"]
        return self._place.read_range(self._tar, offset, offset + size)

    @property
    def image(self) -> Image.Image:
        """The image, decoded: PIL, mode RGB."""
        from PIL import Image

        return Image.open(io.BytesIO(self.jpeg)).convert("RGB")

    def __repr__(self) -> str:
        return f"<Sample {self.key} {self.width} × {self.height}: {self.caption[:60]!r}>"

    def _repr_html_(self) -> str:
        return _card(self, 320)


class OpenDataset:
    """A finished dataset: `len(ds)`, `ds[i]`, `ds.ledger`, `ds.captions(layer)`, `ds.funnel`, `ds.torch(…)`.

    Samples come in the order of the shards, which is the order of their keys. Nothing is held but tables of the shards
    that were read last.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._dataset = Dataset(storage)
        self.manifest = self._dataset.manifest
        self._starts = [0, *itertools.accumulate(entry.samples for entry in self.manifest.shards)]
        self._table = functools.lru_cache(_TABLES)(self._dataset.table)

    @property
    def url(self) -> str:
        """The dataset's folder or URL."""
        return self.storage.url

    @property
    def counts(self) -> dict[str, int]:
        """Rows by outcome."""
        return dict(self.manifest.counts)

    @property
    def funnel(self) -> Funnel:
        """The steps of the selection and the rows left after each."""
        return Funnel(self.manifest.funnel)

    @property
    def layers(self) -> list[str]:
        """Ids of the caption layers, the oldest first."""
        return store.list_layers(self.storage)

    @property
    def ledger(self) -> Table:
        """One row per input row: key, URL, caption, outcome, reason, sizes, scores (docs/formats.md)."""
        names = [entry.table for entry in self.manifest.ledger]
        return self._relation(self._scan(names, LEDGER_SCHEMA))

    @property
    def samples(self) -> Table:
        """One row per sample, in the order of `ds[i]`."""
        return self._relation(self._scan([entry.table for entry in self.manifest.shards], SHARD_SCHEMA))

    def captions(self, layer: str = "latest") -> Table:
        """Return the captions of a layer for the images that the dataset holds now: key, slot, text, flags.

        Raises RecipeError if there is no such layer, and FileNotFoundError if a shard has not been captioned yet.
        """
        found = store.find_layer(self.storage, layer)
        tables = [store.rows_of_shard(self.storage, found, entry.name) for entry in self.manifest.shards]
        return self._relation(pa.concat_tables(tables) if tables else store.SCHEMA.empty_table())

    def torch(self, *, batch: int, size: int, layer: str | None = "latest", **options: Any) -> TorchBatches:
        """Return batches for a training loop: an iterable whose whole state is one integer.

        See `capstan.torch_batches.TorchBatches` for the options. `layer` falls back to the original captions if the
        dataset has none.
        """
        from capstan.pipeline.errors import MissingExtra

        try:
            from capstan.torch_batches import TorchBatches
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingExtra("ds.torch", "PyTorch is not installed", "train") from None

        if layer == "latest" and not self.layers:
            layer = None
        return TorchBatches(self._dataset, batch=batch, size=size, layer=layer, **options)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = bisect.bisect_right(self._starts, number) - 1
        entry = self.manifest.shards[place]
        row = self._table(entry.name).slice(number - self._starts[place], 1).to_pylist()[0]
        return self._sample(row, entry.tar)

    def __iter__(self) -> Iterator[Sample]:
        for entry in self.manifest.shards:
            for batch in self._table(entry.name).to_batches(max_chunksize=256):
                for row in batch.to_pylist():
                    yield self._sample(row, entry.tar)

    def __repr__(self) -> str:
        return f"<capstan dataset {self.url}: {len(self):,} samples in {len(self.manifest.shards)} shards>"

    def _repr_html_(self) -> str:
        step = max(1, len(self) // _SHOWN)
        cards = "".join(_card(self[i], _THUMBNAIL) for i in range(0, len(self), step)[:_SHOWN])
        outcomes = {name: count for name, count in self.counts.items() if name not in ("rows", "shards")}
        counts = ", ".join(f"{count:,} {escape(name)}" for name, count in outcomes.items())
        layers = ", ".join(map(escape, self.layers)) or "none"
        return (
            f"<p><b>{escape(self.url)}</b>: {len(self):,} samples in {len(self.manifest.shards)} shards<br>"
            f"{self.counts.get('rows', 0):,} rows: {counts}<br>caption layers: {layers}</p>"
            f'<div style="display:flex;flex-wrap:wrap;gap:8px">{cards}</div>'
        )

    def _sample(self, row: Mapping[str, Any], tar: str) -> Sample:
        scores = {name: value for name, value in row.items() if name not in SHARD_SCHEMA.names}
        facts = {name: row[name] for name in ("key", "caption", "url", "width", "height")}
        return Sample(**facts, scores=scores, row=dict(row), _place=self.storage, _tar=tar)

    def _scan(self, names: Sequence[str], schema: pa.Schema) -> Any:
        """Return a lazy table over files of one schema: that of the first, which has the columns of the scorers."""
        if not names:
            return schema.empty_table()
        return self.storage.dataset(list(names), self.storage.dataset([names[0]], schema).schema)

    def _relation(self, table: Any) -> Table:
        connection = duckdb.connect()
        return Table(connection.from_arrow(table), connection)


def _card(sample: Sample, side: int) -> str:
    """Return a thumbnail with its caption, as HTML that loads nothing."""
    image = sample.image
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    source = base64.b64encode(data.getvalue()).decode()
    return (
        f'<figure style="margin:0;width:{side}px"><img style="width:100%" src="data:image/jpeg;base64,{source}" alt="">'
        f'<figcaption style="font-size:small">{escape(sample.caption[:200])}</figcaption></figure>'
    )
