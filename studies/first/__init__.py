"""The first study, closed: 5 epochs, the learning rate alone searched. Its rows, tables and figures."""
