"""DCP's writer, with checksums."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rrhf_fast.stages.checkpoint_files import checksums, write_checksums


@dataclass(frozen=True)
class _Written(WriteResult):
    """What was written, and the checksum of the file that it was written to."""

    checksum: str


class Writer(dcp.FileSystemWriter):
    """Each rank hashes the files it wrote; the coordinator gets the sums with the results, and
    writes them after everything else."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """Write and hash this rank's files."""
        results = super().write_data(plan, planner).wait()
        sums = checksums(Path(self.path), {_file(result) for result in results})
        done = Future()
        done.set_result([_Written(**vars(r), checksum=sums[_file(r)]) for r in results])
        return done

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, then the checksums of all files."""
        super().finish(metadata, results)
        written = [result for of_rank in results for result in of_rank]
        write_checksums(Path(self.path), {_file(r): r.checksum for r in written})


def _file(result: WriteResult) -> str:
    return result.storage_data.relative_path
