"""Problems of a run that types cannot express, one file a section."""
