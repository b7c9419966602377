"""Turn a checkpoint of a run into a folder that from_pretrained and vLLM read.

python -m rrhf_fast.export --checkpoint out/checkpoint-100 --output_dir model
python -m rrhf_fast.export --checkpoint out --output_dir model --merge true   # out: LoRA adapters
"""

from rrhf_fast.export import ExportConfig
from rrhf_fast.stages.command import fail, leave, run_command
from rrhf_fast.stages.loading import quick_imports
from rrhf_fast.stages.next_step import after_export
from rrhf_fast.stages.outlet import say


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 it could not be written, 2 a mistake in
    options, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    return run_command("export", __doc__, ExportConfig, _run, arguments, many_processes=False)


def _run(config: ExportConfig) -> int:
    with quick_imports():  # not needed for --help
        from rrhf_fast.export.run import run
        from rrhf_fast.model.save import SaveFailed

    try:
        folder = run(config)
        say(f"the model is in {folder}")
    except SaveFailed as error:
        return fail("export", f"{error}; run the same command again", 1)
    if not config.push_to_hub:
        say(after_export(folder))
    return 0


if __name__ == "__main__":
    leave(main)
