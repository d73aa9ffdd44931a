"""The job graphs of the recipes as a remote runner would get them, and what travels through them.

After a wanted change:  cd tests; python integration/graphs.py NAME > golden/graph_NAME.txt
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jobs
from apache_beam.internal import pickler
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners import pipeline_context
from apache_beam.runners.portability.fn_api_runner import execution

from data_beam import runners

MARK = "markedsentence "  # stands in one document of the input
SHUFFLE = common_urns.primitives.GROUP_BY_KEY.urn


@dataclasses.dataclass
class Job:
    """One Beam job of a recipe, and whether the text of documents went through a shuffle of it."""

    proto: Any
    documents_shuffled: bool = False

    @property
    def transforms(self) -> dict[str, Any]:
        return dict(self.proto.components.transforms)

    def leaves(self) -> list[Any]:
        return [t for t in self.transforms.values() if not t.subtransforms]

    def steps(self) -> Iterator[Any]:
        """What the pipeline's author wrote, in order."""
        for root in self.proto.root_transform_ids:
            for name in self.transforms[root].subtransforms:
                yield self.transforms[name]

    def shuffles(self) -> list[Any]:
        return [t for t in self.transforms.values() if t.spec.urn == SHUFFLE]

    def shuffled(self) -> Iterator[tuple[str, Any]]:
        """Name and coder of what goes into every shuffle."""
        context = pipeline_context.PipelineContext(self.proto.components)
        for shuffle in self.shuffles():
            (collection,) = shuffle.inputs.values()
            coder = self.proto.components.pcollections[collection].coder_id
            yield shuffle.unique_name, context.coders.get_by_id(coder)

    def functions(self) -> Iterator[tuple[str, bytes]]:
        """Name and pickled DoFn of every ParDo."""
        for transform in self.leaves():
            if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
                payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
                yield transform.unique_name, payload.do_fn.payload

    def fused_with_the_source(self) -> Iterator[str]:
        """Steps of this package that run where the list of inputs is made, before any shuffle."""
        ours = {name for name, pickled in self.functions() if _is_ours(pickled)}
        reached = [t for t in self.leaves() if t.spec.urn == common_urns.primitives.IMPULSE.urn]
        for transform in reached:
            if transform.unique_name in ours:
                yield transform.unique_name
            outputs = set(transform.outputs.values())
            for other in self.leaves():
                follows = outputs & set(other.inputs.values())
                if follows and other not in reached and other.spec.urn != SHUFFLE:
                    reached.append(other)


def _is_ours(pickled: bytes) -> bool:
    function = pickler.loads(pickled)[0]
    inner = getattr(function, "_fn", None) or getattr(function, "fn", None)
    modules = {type(function).__module__, getattr(inner, "__module__", "")}
    return any(str(module).startswith("data_beam.") for module in modules)


@contextlib.contextmanager
def recorded(run: Callable | None = None) -> Iterator[list[Job]]:
    """Every Beam job that the body starts; `run` runs them, the runner itself by default."""
    found: list[Job] = []
    run = run or runners.run
    append = execution.GroupingBuffer.append

    def record(pipeline):
        found.append(Job(pipeline.to_runner_api()))
        return run(pipeline)

    def look(buffer, data):
        if MARK.encode() in data:
            found[-1].documents_shuffled = True
        append(buffer, data)

    with (
        mock.patch.object(runners, "run", record),
        mock.patch.object(execution.GroupingBuffer, "append", look),
    ):
        yield found


def web_text(folder: Path) -> None:
    from data_beam.dedup.lines import RepeatedLines
    from data_beam.pipelines import web_text

    pages = jobs.write_pages(folder / "pages", 200_000)
    (pages / "marked.txt").write_text(jobs.real_texts()[0][1] + "\n\n" + MARK * 3)
    settings = web_text.WebText(lines=RepeatedLines())
    web_text.run([str(pages)], folder / "out", settings, shards=2)


def corpus(folder: Path) -> None:
    from data_beam.pipelines import corpus

    sources = jobs.write_sources(folder / "sources")
    (sources / "marked.txt").write_text(jobs.real_texts()[0][1] + "\n\n" + MARK * 3)
    corpus.run(folder / "out", corpus=str(sources))


def code(folder: Path) -> None:
    from data_beam.io import readers
    from data_beam.pipelines import code

    sources = jobs.write_sources(folder / "sources")
    (sources / "json" / "marked.py").write_text(
        '"""' + jobs.real_texts()[0][1].replace('"', "") + MARK * 3 + '"""\n'
    )
    read = readers.ReadOptions(repo_depth=1)
    code.run([str(sources)], folder / "out", read=read, shards=2)


RECIPES = {"web_text": web_text, "code": code, "corpus": corpus}


def text(found: list[Job]) -> str:
    """Steps with their URN, shuffles within them counted."""
    lines = []
    for number, job in enumerate(found):
        lines.append(f"job {number}")
        for step in job.steps():
            inner = [s for s in job.shuffles() if s.unique_name.startswith(step.unique_name + "/")]
            urn = step.spec.urn.removeprefix("beam:transform:").removesuffix(":v1")
            lines.append(f"  {step.unique_name}: {urn}{', shuffles' * len(inner)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, recorded() as all_jobs:
        RECIPES[sys.argv[1]](Path(temporary))
    sys.stdout.write(text(all_jobs))
