"""`info`, `truncate`, `models` and `selftest`: commands that need no network, or hardly."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqmim import bitstream
from pqmim.batch import Handling, Note, Result
from pqmim.bitstream import VERSION, Container, parse
from pqmim.cli import options as opt
from pqmim.cli.coding import file_summary
from pqmim.cli.kinds import PQM, check_output
from pqmim.cli.pictures import percent
from pqmim.cli.running import Codecs, do, exit_with, handling_of, one_line_errors, reading_jobs, run
from pqmim.errors import LimitError, ModelError, ModelMismatchError, TargetError
from pqmim.jobs import Job, Kinds, Naming
from pqmim.options import Device
from pqmim.reporting import Reporter

if TYPE_CHECKING:
    from pqmim.model_files import ShippedModel

STRIDE = 16
QUICK_POSITIONS = 2_048
POSITIONS_PER_BYTE = 16
MAX_POSITIONS = 16_384
"""`info` decodes the tokens of a partial file, to count them, only if the grid has at most MAX_POSITIONS, and at most
QUICK_POSITIONS and POSITIONS_PER_BYTE for each byte of the payload: a few bytes must not claim minutes of work."""


@dataclass
class _Info:
    codecs: Codecs
    shipped: list[ShippedModel]

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        from pqmim.decoder_files import decoders_beside

        container = parse(data)
        fields, text = file_summary(container, len(data))
        model = next((known for known in self.shipped if known.model_id.startswith(container.model_id)), None)
        name = None if model is None else model.name
        known_share = self._known_share(data, container, note)
        kept = _metadata_sizes(container)
        fields |= {
            "version": VERSION,
            "is_mini": container.is_mini,
            "model_id": container.model_id.hex(),
            "model": name,
            "decoders": [] if model is None else [entry.name for entry in decoders_beside(model.path)],
            "level": container.level,
            "payload_bytes": len(container.payload),
            "alpha_bytes": len(container.alpha or b""),
            "metadata_bytes": len(container.metadata or b""),
            "metadata": kept,
            "known_share": None if known_share is None else round(known_share, 6),
            "token_check": None if container.token_check is None else f"{container.token_check:04x}",
        }
        parts = [
            f"{container.width} x {container.height}",
            text,
            "mini form" if container.is_mini else "full form",
            f"model {name or 'unknown'} ({container.model_id.hex()})",
            *([f"decoders {', '.join(fields['decoders'])}"] if fields["decoders"] else []),
            f"level {container.level}",
            f"payload {len(container.payload):,} B",
        ]
        if container.alpha is not None:
            parts.append(f"alpha {len(container.alpha):,} B")
        if container.metadata is not None:
            sizes = ", ".join(f"{name.upper()} {size:,}" for name, size in kept.items())
            parts.append(f"metadata {len(container.metadata):,} B ({sizes})")
        if container.is_partial:
            parts.append(f"holds {'an unknown share' if known_share is None else percent(known_share)} of the tokens")
        return lambda: Result(fields, "  ".join(parts))

    def _known_share(self, data: bytes, container: Container, note: Note) -> float | None:
        """Share of the tokens that a file holds; None if nobody here can tell, or not at once."""
        if not container.is_partial:
            return 1.0
        if self.codecs.model is not None:
            self.codecs.named(self.codecs.model, note)  # a model that was named must be there
        side = STRIDE * container.scale
        num_positions = -(-container.width // side) * -(-container.height // side)
        if num_positions > min(QUICK_POSITIONS + POSITIONS_PER_BYTE * len(container.payload), MAX_POSITIONS):
            note("share of the tokens unknown: it would take long to decode them")
            return None
        try:
            grid = self.codecs.for_file(container, note).decode_tokens(data)
        except (ModelError, ModelMismatchError, LimitError) as error:
            note(f"share of the tokens unknown: {error}")
            return None
        return float((grid >= 0).mean())


def _metadata_sizes(container: Container) -> dict[str, int]:
    """Sizes of what a file keeps besides the picture, bytes, before it was packed."""
    if container.metadata is None:
        return {}
    from pqmim.metadata import unpack

    found = unpack(container.metadata)
    items = {"exif": found.exif, "icc": found.icc, "xmp": found.xmp}
    return {name: len(content) for name, content in items.items() if content}


def info(
    inputs: opt.Inputs, model: opt.DecodingModel = None, as_json: opt.Json = False, verbose: opt.Verbose = 0
) -> None:
    """Show what .pqm files hold, and check that they are whole.

    The share of the tokens that a partial file holds is found by decoding them, for which the model must be there. Of
    files for which that takes long it is not told.
    """
    reporter = Reporter(as_json, verbosity=verbose)
    with one_line_errors(reporter):
        from pqmim.model_files import shipped_models

        shipped = shipped_models()
        jobs = reading_jobs(inputs, Kinds(PQM), reporter)
    do(jobs, _Info(Codecs(model), shipped), Handling(), reporter)


@dataclass
class _Truncate:
    num_bytes: int | None
    bpp: float | None

    def __call__(self, data: bytes, job: Job, note: Note) -> Callable[[], Result]:
        container = parse(data)
        limit = opt.bytes_at(self.bpp, container) if self.bpp is not None else self.num_bytes
        assert limit is not None  # one of the two was given

        def make_result() -> Result:
            smallest = bitstream.smallest_size(data)
            if limit < smallest:
                raise TargetError(f"no file of {limit:,} bytes is possible; the smallest has {smallest:,}")
            cut = bitstream.truncate(data, limit)
            return Result(*file_summary(parse(cut), len(cut)), cut)

        return make_result


def truncate(
    inputs: opt.Inputs,
    output: opt.Output = None,
    num_bytes: Annotated[
        int | None, typer.Option("--bytes", metavar="N", min=1, help="Largest size.", show_default=False)
    ] = None,
    bpp: Annotated[
        float | None, typer.Option(metavar="X", help="Most bits per pixel of the image.", show_default=False)
    ] = None,
    force: opt.Force = False,
    skip_existing: opt.SkipExisting = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Cut .pqm files to smaller ones without decoding them; the decoder fills what is missing."""
    opt.only_one_of({"--bytes": num_bytes, "--bpp": bpp}, is_one_needed=True)
    opt.check_bpp(bpp, "--bpp")
    if output is None and any(os.path.isdir(name) or Path(name).suffix.lower() in PQM for name in inputs):
        raise typer.BadParameter("say where to: an input is never overwritten", param_hint="'-o' / '--output'")
    check_output(inputs, output, PQM, is_any_other=False)
    run(
        inputs,
        output,
        Naming(".pqm", PQM),
        Kinds(PQM),
        _Truncate(num_bytes, bpp),
        handling=handling_of(force=force, skip_existing=skip_existing),
        reporter=Reporter(as_json, quiet, verbose),
    )


def models(as_json: opt.Json = False, verbose: opt.Verbose = 0) -> None:
    """List the token models that come with the package, each with its decoders."""
    reporter = Reporter(as_json, verbosity=verbose)
    with one_line_errors(reporter):
        from pqmim.decoder_files import decoders_beside
        from pqmim.model_files import shipped_models

        for shipped in shipped_models():
            size = shipped.path.stat().st_size
            fields = {
                "name": shipped.name,
                "model_id": shipped.model_id.hex(),
                "bytes": size,
                "description": shipped.description,
            }
            text = f"{shipped.model_id.hex()}  {size / 1e6:.1f} MB  {shipped.description}"
            reporter.result(shipped.name, text, fields)
            for decoder in decoders_beside(shipped.path):
                size = decoder.path.stat().st_size
                fields = {
                    "name": decoder.name,
                    "model": shipped.name,
                    "decoder_id": decoder.decoder_id.hex(),
                    "bytes": size,
                    "has_realism": decoder.faithful is not None,
                    "description": decoder.description,
                }
                text = f"{decoder.decoder_id.hex()}  {size / 1e6:.1f} MB  {decoder.description}"
                reporter.result(f"  decoder {decoder.name}", text, fields)


def selftest(device: opt.DeviceOption = Device.AUTO, verbose: opt.Verbose = 0) -> None:
    """Check that this machine decodes files to the tokens they were made of."""
    reporter = Reporter(verbosity=verbose)
    with one_line_errors(reporter):
        from pqmim.selftest import run as run_checks

        for check in run_checks(device=device.value):
            if check.error is None:
                reporter.result("ok", check.name, {})
            else:
                reporter.result("FAILED", f"{check.name}: {check.error}", {})
                reporter.num_failed += 1
    exit_with(reporter)
