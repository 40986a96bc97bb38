"""Parquet files: opened by path or address; predictions as rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cascade_det.errors import ConfigError, DatasetError
from cascade_det.offline.addresses import missing_extra, naming_address, opened
from cascade_det.text import printable

# The key of our metadata in a file's schema, and the version of columns and metadata.
METADATA_KEY = b"cascade_det"
FORMAT = 1


def pyarrow() -> Any:
    """The package, with its module ``parquet``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            missing_extra("parquet files are read and written by pyarrow", error)
        ) from None
    return pyarrow


@contextmanager
def open_parquet(address: str) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile`` by path or address.

    Raises:
        CascadeDetError: it is missing, or no parquet file; also from the block.
    """
    with opened(address) as file, pyarrow().parquet.ParquetFile(file) as content:
        yield content


def prediction_schema(metadata: Mapping[str, Any]) -> Any:
    """The schema of predictions, described in docs/offline.md; metadata becomes json."""
    pa = pyarrow()
    mask = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    fields = [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("boxes", pa.list_(pa.list_(pa.float32()))),
        pa.field("scores", pa.list_(pa.float32())),
        pa.field("classes", pa.list_(pa.int32())),
        pa.field("category_ids", pa.list_(pa.int64())),
        pa.field("masks", pa.list_(mask)),
        pa.field("exit_stages", pa.list_(pa.int32())),
        pa.field("milliseconds", pa.float32()),
        pa.field("error", pa.string()),
    ]
    text = json.dumps({"format": FORMAT, **metadata})
    return pa.schema(fields, metadata={METADATA_KEY: text.encode()})


def write_rows(rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> bytes:
    """The content of a parquet file of predictions."""
    pa = pyarrow()
    table = pa.Table.from_pylist(list(rows), schema=prediction_schema(metadata))
    content = io.BytesIO()
    pa.parquet.write_table(table, content, compression="zstd")
    return content.getvalue()


def read_metadata(address: str) -> dict[str, Any]:
    """What :func:`write_rows` was told besides rows.

    Raises:
        DatasetError: the file holds no predictions, or those of another version.
    """
    with open_parquet(address) as file:
        return _metadata_of(file, address)


def read_rows(address: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a file of predictions, a row group in memory at a time.

    Args:
        address: path or address.
        columns: those to read; ``None`` for all.

    Raises:
        DatasetError: the file holds no predictions, or those of another version.
        CascadeDetError: it is missing or damaged.
    """
    with open_parquet(address) as file:
        _metadata_of(file, address)
        if not file.schema_arrow.equals(prediction_schema({}), check_metadata=False):
            raise DatasetError(f"{printable(address)}: has other columns than predictions")
        for group in range(file.num_row_groups):
            with naming_address(address):
                rows = file.read_row_group(group, columns=columns).to_pylist()
            yield from rows


def _metadata_of(file: Any, address: str) -> dict[str, Any]:
    with naming_address(address):
        text = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
        content = json.loads(text) if text is not None else {}
        version = content.get("format")
    if version != FORMAT:
        raise DatasetError(
            f"{printable(address)}: holds no predictions of cascade-det predict --engine, or of "
            f"another version ({version!r}, not {FORMAT})"
        )
    return dict(content)
