# The public names and where they live: `__init__.py` loads each on first use, and type checkers read this alone.
from .core.sampling_params import SamplingParams as SamplingParams
from .core.target import Target as Target
from .core.target import stop_token_ids as stop_token_ids
from .core.vocabulary import draft_vocabulary as draft_vocabulary
from .decoding.acceptance import AcceptanceReport as AcceptanceReport
from .decoding.acceptance import bootstrap_interval as bootstrap_interval
from .decoding.speculation import SpeculationSettings as SpeculationSettings
from .decoding.speculation import speculate as speculate
from .drafters import DRAFTERS as DRAFTERS
from .drafters import create_drafter as create_drafter
from .evaluation.measure import evaluate_drafters as evaluate_drafters
from .evaluation.measure import measure_acceptance as measure_acceptance
from .evaluation.report import acceptance_table as acceptance_table
from .evaluation.report import plot_acceptance as plot_acceptance
from .evaluation.suites import load_suite as load_suite
from .evaluation.traces import Trace as Trace
from .evaluation.traces import trace_texts as trace_texts
from .evaluation.viewer import print_traces as print_traces
from .evaluation.viewer import write_trace_page as write_trace_page
from .folders.checkpoints import export_drafter as export_drafter
from .folders.checkpoints import load_drafter as load_drafter
from .folders.hub import push_drafter as push_drafter
from .folders.inspection import inspect_drafter as inspect_drafter
from .training.config import DraftOPDConfig as DraftOPDConfig
from .training.optim import MuonWithAdamW as MuonWithAdamW
from .training.trainer import DraftOPDTrainer as DraftOPDTrainer

__version__: str
