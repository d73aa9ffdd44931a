"""Which Beam runner a job uses, and Beam itself without its import noise.

Local runs use `FnApiRunner` in memory. The stock DirectRunner first tries Prism, which it downloads
from GitHub, so its name stands for FnApiRunner here; any other runner (FlinkRunner, DataflowRunner,
PortableRunner ...) and its options pass through unchanged. Jobs of many minutes use both cores with

    --direct_running_mode=multi_processing --direct_num_workers=2

which starts workers as processes (about 6 s). Remote jobs say their state and how long they have
been running; Ctrl-C cancels them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from data_beam import progress
from internlm2_jax.errors import UserError
from internlm2_jax.progress import PLAIN_INTERVAL_SECONDS

# Importing Beam without the Google Cloud extra warns on the root logger, which installs a handler.
logging.disable(logging.WARNING)
try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import (
        FlinkRunnerOptions,
        GoogleCloudOptions,
        JobServerOptions,
        PipelineOptions,
        PortableOptions,
        StandardOptions,
        WorkerOptions,
    )
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner, fn_runner
    from apache_beam.runners.portability.portable_runner import JobServiceHandle
    from apache_beam.runners.runner import PipelineState
finally:
    logging.disable(logging.NOTSET)


class UnknownOption(UserError):
    """`name` is an option that Beam does not know, without the dashes."""

    def __init__(self, name: str, close: Sequence[str] = ()):
        hint = f"; did you mean --{close[0]}?" if close else ""
        super().__init__(f"neither this command nor Beam has an option --{name}{hint}")
        self.name = name


LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "InProcessRunner")
# Runners behind a job server, which has options of its own that Beam's Python does not know.
JOB_SERVER_RUNNERS = ("PortableRunner", "FlinkRunner", "SparkRunner")
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 1.0
_IN_BETWEEN_MASTERS = ("[local]", "[auto]")


def runner_name(options: Sequence[str] = ()) -> str:
    """The class name of the runner that these Beam options mean."""
    name = PipelineOptions(list(options)).view_as(StandardOptions).runner or "FnApiRunner"
    last = name.rpartition(".")[2]
    known = {each.lower(): each for each in (*LOCAL_RUNNERS, *JOB_SERVER_RUNNERS, "DataflowRunner")}
    return known.get(last.lower(), known.get(f"{last.lower()}runner", last))


def is_local(options: Sequence[str] = ()) -> bool:
    """Whether these Beam options mean the runner inside this process."""
    return runner_name(options) in LOCAL_RUNNERS


def pipeline(options: Sequence[str] = ()) -> beam.Pipeline:
    """A pipeline for the Beam command-line `options`, on FnApiRunner unless they name another.

    What can be known to fail before any work is done is a UserError here: an option that nobody
    knows, a package or program that is missing, a cluster that does not answer.
    """
    parsed = PipelineOptions(list(options))
    name = runner_name(options)
    if name not in JOB_SERVER_RUNNERS:
        _check_known(parsed)
    if name in LOCAL_RUNNERS:
        return _local(parsed)
    _check_reachable(name, parsed)
    if name in JOB_SERVER_RUNNERS:
        names = parsed.view_as(GoogleCloudOptions)
        names.job_name = f"{names.job_name or 'data-beam'}-{uuid.uuid4().hex[:12]}"
    try:
        return beam.Pipeline(options=parsed)
    except (ValueError, ImportError, AttributeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"Beam cannot use --runner={name}: {message}") from error


def run(pipeline: beam.Pipeline) -> Any:
    """Runs to the end. A UserError raised in a worker comes out as itself: Beam wraps it in others,
    adds the name of the step, and logs a traceback. KeyboardInterrupt cancels a remote job."""
    name = type(pipeline.runner).__name__
    with _no_tracebacks_of_user_errors():
        try:
            result = pipeline.run()
            if name in LOCAL_RUNNERS:
                result.wait_until_finish()
            else:
                _follow(result, name, pipeline.options)
            return result
        except Exception as error:
            message = _user_error(error) or _environment_error(error, name)
            if message is None:
                raise
            raise UserError(message) from None


def spread(pipeline: beam.Pipeline, shards: Iterable[Any]) -> beam.PCollection:
    """`shards` as a collection whose elements workers share out among them."""
    return pipeline | "Shards" >> beam.Create(shards) | "SpreadShards" >> beam.Reshuffle()


def run_over(
    shards: Collection[Any],
    step: str,
    work: beam.DoFn,
    options: Sequence[str] = (),
    *,
    shown: str,
    documents: int | None = None,
) -> None:
    """Runs a pipeline of one step, `work` on each of `shards`, none of which needs another.

    Args:
      shown: name of the job's progress.
      documents: how many of them the shards hold, where `work` counts those and not shards.
    """
    if not shards:
        return
    graph = pipeline(options)
    _ = spread(graph, shards) | step >> beam.ParDo(work)
    total, unit = (len(shards), "shard") if documents is None else (documents, "document")
    with progress.show(shown, total, unit):
        run(graph)


def _local(options: PipelineOptions) -> beam.Pipeline:
    options.view_as(StandardOptions).runner = "FnApiRunner"
    workers = options.view_as(WorkerOptions)
    if workers.default_sdk_harness_log_level is None:
        # Worker processes log to this terminal, all at once; an exception is raised here anyway.
        workers.default_sdk_harness_log_level = "CRITICAL"
    # Workers in processes of their own get their options through this.
    info = beam_provision_api_pb2.ProvisionInfo(
        pipeline_options=JobServiceHandle.encode_pipeline_options(options.get_all_options())
    )
    runner = FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(info))
    return beam.Pipeline(runner=runner, options=options)


def _check_known(options: PipelineOptions) -> None:
    """Beam drops options that it does not know, a mistyped one among them."""
    known = options.get_all_options()
    for name in sorted(options.get_all_options(retain_unknown_options=True).keys() - known.keys()):
        raise UnknownOption(name, difflib.get_close_matches(name, known, 1))


# --- remote jobs ------------------------------------------------------------------------------


def _check_reachable(name: str, options: PipelineOptions) -> None:
    endpoint = options.view_as(PortableOptions).job_endpoint
    if name == "DataflowRunner" and importlib.util.find_spec("apitools") is None:
        raise UserError(
            "--runner=DataflowRunner needs Beam's Google Cloud packages: "
            "pip install 'internlm2-jax[dataflow]'"
        )
    if name not in JOB_SERVER_RUNNERS or endpoint == "embed":
        return
    if endpoint:
        _connect(endpoint, "job server", "--job_endpoint")
        return
    if name == "PortableRunner":
        raise UserError(
            "--runner=PortableRunner needs --job_endpoint=HOST:PORT, where a job server listens; "
            "`python -m data_beam.flink` starts a Flink cluster with one"
        )
    server = options.view_as(JobServerOptions)
    if shutil.which(server.job_server_java_launcher) is None:
        raise UserError(
            f"--runner={name} starts a job server in Java, but {server.job_server_java_launcher} "
            "is not on the PATH; install Java 17, or give --job_endpoint of a running job server"
        )
    if name == "FlinkRunner":
        master = options.view_as(FlinkRunnerOptions).flink_master.strip()
        if master not in _IN_BETWEEN_MASTERS:
            _connect(master, "Flink cluster", "--flink_master")


def _connect(address: str, what: str, option: str) -> None:
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no {what} answers at {option}={address} ({reason}); start it, or mend host and port"
        ) from error


def _follow(result: Any, name: str, options: PipelineOptions) -> None:
    """Waits for a remote job and says how it stands; cancels it when interrupted."""
    ended = threading.Event()
    watch = threading.Thread(target=_show_state, args=(result, name, ended), daemon=True)
    in_main = threading.current_thread() is threading.main_thread()
    # Beam's own handler would stop the job server before the job could be cancelled through it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler) if in_main else None
    watch.start()
    try:
        result.wait_until_finish()
    except KeyboardInterrupt:
        print(f"{name}: interrupted, cancelling the job", file=sys.stderr, flush=True)
        _cancel(result, options)
        raise
    finally:
        ended.set()
        watch.join(_CONNECT_SECONDS)
        if in_main:
            signal.signal(signal.SIGINT, previous)
    if result.state == PipelineState.CANCELLED:
        raise UserError(f"the job on {name} was cancelled; run the same command to continue it")


def _cancel(result: Any, options: PipelineOptions) -> None:
    """Through the job server, and on Flink itself: Beam's job server lets go of a batch job there,
    which then runs on."""
    with contextlib.suppress(Exception):
        result.cancel()
    master = options.view_as(FlinkRunnerOptions).flink_master.strip()
    if master not in _IN_BETWEEN_MASTERS:
        from data_beam.flink import rest

        try:
            rest.cancel_named(master, options.view_as(GoogleCloudOptions).job_name)
        except OSError as error:
            print(f"Flink at {master} did not take it ({error})", file=sys.stderr, flush=True)


def _show_state(result: Any, name: str, ended: threading.Event) -> None:
    """State and elapsed time: one live line on a terminal, else a line at each change of the state
    and every ten seconds."""
    live = sys.stderr.isatty()
    start = last_line = time.monotonic()
    shown = None
    with tqdm(bar_format="{desc}", disable=not live, leave=False, file=sys.stderr) as bar:
        while True:
            stop = ended.wait(_POLL_SECONDS)
            try:
                state = result.state
            except Exception:  # the job server may be gone: wait_until_finish tells
                state = shown
            now = time.monotonic()
            minutes, seconds = divmod(int(now - start), 60)
            text = f"{name}: {state}, {minutes}m{seconds:02d}s"
            if live:
                bar.set_description_str(text)
            elif state != shown or now - last_line >= PLAIN_INTERVAL_SECONDS:
                print(text, file=sys.stderr, flush=True)
                last_line = now
            shown = state
            if stop:
                return


# --- errors and noise -------------------------------------------------------------------------


def _user_error(error: BaseException) -> str | None:
    """The message of the UserError that `error` stems from, if there is one."""
    message: str | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            message = str(cause)
        elif message is None:
            message = _user_error_in(str(cause))
        cause = cause.__cause__
    return message and message.partition(" [while running")[0]


def _user_error_in(text: str) -> str | None:
    """From another process only the text of the traceback is left."""
    if "UserError: " not in text:
        return None
    return text.rpartition("UserError: ")[2].splitlines()[0].partition(" [while running")[0]


def _environment_error(error: BaseException, name: str) -> str | None:
    """What starting a job server reports when its jar cannot be had."""
    text = " ".join(str(error).split())
    if "Unable to fetch remote job server jar" in text:
        url = text.partition("jar at ")[2].partition(": ")[0]
        return (
            f"--runner={name} could not download its job server ({url.rpartition('/')[2]}); give "
            "--flink_job_server_jar=FILE (`python -m data_beam.flink` builds one) or --job_endpoint"
        )
    return None


@contextlib.contextmanager
def _no_tracebacks_of_user_errors() -> Iterator[None]:
    names = ("apache_beam.runners.common", "apache_beam.runners.worker.sdk_worker", "")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_is_not_user_error)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_user_error)


def _is_not_user_error(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and _user_error(error) is not None:
        return False
    return _user_error_in(record.getMessage()) is None


def _is_not_about_options(record: logging.LogRecord) -> bool:
    """Beam's Python does not know the options of job servers; that is in order."""
    message = record.getMessage()
    return not message.startswith(("Unparseable argument: ", "Discarding unparseable args: "))


# Unknown options are an error where they can be told (`_check_known`).
logging.getLogger("apache_beam.options.pipeline_options").addFilter(_is_not_about_options)
