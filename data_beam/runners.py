"""Which Beam runner a job uses, and Beam itself without its import noise.

Local runs use `FnApiRunner` in memory. The stock DirectRunner first tries Prism, which it downloads
from GitHub, so its name stands for FnApiRunner here; any other runner (FlinkRunner, DataflowRunner,
PortableRunner ...) and its options pass through unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from internlm2_jax.errors import UserError

# Importing Beam without the Google Cloud extra warns on the root logger, which installs a handler.
logging.disable(logging.WARNING)
try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
finally:
    logging.disable(logging.NOTSET)

LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "InProcessRunner")


def pipeline(options: Sequence[str] = ()) -> beam.Pipeline:
    """A pipeline for the Beam command-line `options`, on FnApiRunner unless they name another."""
    parsed = PipelineOptions(list(options))
    name = parsed.view_as(StandardOptions).runner
    if name is not None and name.rpartition(".")[2] not in LOCAL_RUNNERS:
        try:
            return beam.Pipeline(options=parsed)
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(f"Beam cannot use --runner={name}: {error}") from error
    parsed.view_as(StandardOptions).runner = "FnApiRunner"
    return beam.Pipeline(runner=FnApiRunner(), options=parsed)


def run(pipeline: beam.Pipeline) -> Any:
    """Runs to the end. A UserError raised in a worker comes out as itself: Beam wraps it in others,
    adds the name of the step, and logs a traceback."""
    loggers = [
        logging.getLogger(f"apache_beam.runners.{n}") for n in ("common", "worker.sdk_worker")
    ]
    for logger in loggers:
        logger.addFilter(_no_traceback_of_user_errors)
    try:
        result = pipeline.run()
        result.wait_until_finish()
        return result
    except Exception as error:
        message = _user_error(error)
        if message is None:
            raise
        raise UserError(message) from None
    finally:
        for logger in loggers:
            logger.removeFilter(_no_traceback_of_user_errors)


def _user_error(error: BaseException) -> str | None:
    """The message of the UserError that `error` stems from, if there is one."""
    message: str | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            message = str(cause)
        elif message is None and "UserError: " in str(cause):
            # From another process: only the text of the traceback is left.
            message = str(cause).rpartition("UserError: ")[2].splitlines()[0]
        cause = cause.__cause__
    return message and message.partition(" [while running")[0]


def _no_traceback_of_user_errors(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or _user_error(error) is None
