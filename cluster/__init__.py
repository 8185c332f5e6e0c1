"""Where jobs run, and the `capstan` command: the front door of the three floors below."""
