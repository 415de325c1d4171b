"""Any trained model answers for pictures: one protocol, one folder, one file a kind."""
