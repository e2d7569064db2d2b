"""What is checked before the first step: model folders by the names of their files, and nothing that is not needed."""

from pathlib import Path

import pytest

from pipeline.core.config import StudentModel
from pipeline.core.errors import UsageError
from pipeline.core.load import load_config
from pipeline.core.stage import Json
from pipeline.runner.checks import check_before_start, check_model, check_test_rows
from pipeline.runner.session import Session, open_session
from pipeline.runner.steps import plan_steps
from tests.support import write_project
from tests.unit.test_lineage import a_manifest
