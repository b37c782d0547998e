"""Weights in files: read once and safely, fitted to a model by name, and placed by their step."""

from .fitting import Base as Base
from .fitting import fitted as fitted
from .fitting import found_weights as found_weights
from .naming import Trained as Trained
from .naming import aligned as aligned
from .naming import recorded_as as recorded_as
from .rates import Rate as Rate
from .rates import and_others as and_others
from .rates import as_rate as as_rate
from .rates import as_rates as as_rates
from .rates import negligible as negligible
from .rates import rate_for as rate_for
from .reading import Content as Content
from .reading import digest_of_file as digest_of_file
from .reading import outline as outline
from .reading import read as read
from .remembering import remembered as remembered
from .steps import common_steps as common_steps
from .steps import numbers_of as numbers_of
