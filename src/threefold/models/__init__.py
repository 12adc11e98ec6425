"""torch networks: a member (backbone and head), its views, and the deployable pipeline."""
