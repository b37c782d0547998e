"""What Recorder writes while a model trains: weights, step sizes and what else made the step."""

from .recording import Recorder as Recorder
from .records import MODEL_KEY as MODEL_KEY
from .records import MOMENTS_KEY as MOMENTS_KEY
from .records import RECORD_FILE as RECORD_FILE
from .records import RECORD_KEY as RECORD_KEY
from .records import recorded_groups as recorded_groups
from .records import recorded_training as recorded_training
