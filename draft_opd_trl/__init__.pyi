# The public names and where they live: `__init__.py` loads each on first use, and type checkers read this alone.
from .acceptance import AcceptanceReport as AcceptanceReport
from .acceptance import bootstrap_interval as bootstrap_interval
from .checkpoints import export_drafter as export_drafter
from .checkpoints import load_drafter as load_drafter
from .config import DraftOPDConfig as DraftOPDConfig
from .drafters import DRAFTERS as DRAFTERS
from .drafters import create_drafter as create_drafter
from .evaluation import evaluate_drafters as evaluate_drafters
from .evaluation import measure_acceptance as measure_acceptance
from .hub import push_drafter as push_drafter
from .inspection import inspect_drafter as inspect_drafter
from .optim import MuonWithAdamW as MuonWithAdamW
from .report import acceptance_table as acceptance_table
from .report import plot_acceptance as plot_acceptance
from .sampling_params import SamplingParams as SamplingParams
from .speculation import SpeculationSettings as SpeculationSettings
from .speculation import speculate as speculate
from .suites import load_suite as load_suite
from .target import Target as Target
from .target import stop_token_ids as stop_token_ids
from .traces import Trace as Trace
from .traces import trace_texts as trace_texts
from .trainer import DraftOPDTrainer as DraftOPDTrainer
from .viewer import print_traces as print_traces
from .viewer import write_trace_page as write_trace_page
from .vocabulary import draft_vocabulary as draft_vocabulary

__version__: str
