"""Records in, pages, figures and terminal text out. Reports compute nothing that a record does not say."""
