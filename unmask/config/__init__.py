"""Every setting of a run and of the sampler: typed sections, read from YAML and checked before torch loads."""

from unmask.config.run import LoadedConfig as LoadedConfig
from unmask.config.run import RunConfig as RunConfig
from unmask.config.run import config_from_mapping as config_from_mapping
from unmask.config.run import dump_config as dump_config
from unmask.config.run import load_config as load_config
from unmask.config.run import parse_overrides as parse_overrides
