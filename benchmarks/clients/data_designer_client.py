"""NeMo Data Designer: one text column from a seed file of prompts."""

import tempfile
from pathlib import Path

import data_designer.config as dd
import pandas as pd
from data_designer.interface import DataDesigner

from benchmarks.clients.measure import Job, measured


def ask_all(job: Job, folder: Path) -> int:
    """Ask all prompts; returns how many were answered."""
    provider = dd.ModelProvider(name="local", endpoint=job.url, provider_type="openai", api_key="none")
    parameters = dd.ChatCompletionInferenceParams(
        temperature=0.0, max_tokens=job.max_tokens, max_parallel_requests=job.concurrency
    )
    model = dd.ModelConfig(
        alias="teacher", model=job.model, provider="local", inference_parameters=parameters, skip_health_check=True
    )
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    builder.with_seed_dataset(dd.DataFrameSeedSource(df=pd.DataFrame({"question": job.prompts})))
    builder.add_column(dd.LLMTextColumnConfig(name="answer", model_alias="teacher", prompt="{{ question }}"))
    (folder / "assets").mkdir()
    designer = DataDesigner(artifact_path=folder, model_providers=[provider], managed_assets_path=folder / "assets")
    designer.set_run_config(dd.RunConfig(disable_early_shutdown=True))
    dataset = designer.create(builder, num_records=job.count).load_dataset()
    return sum(isinstance(answer, str) for answer in dataset["answer"])


if __name__ == "__main__":
    the_job, counts = Job.from_arguments(), list[int]()
    with tempfile.TemporaryDirectory() as temporary, measured(counts):
        counts.append(ask_all(the_job, Path(temporary)))
