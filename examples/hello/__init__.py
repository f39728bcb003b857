"""All four kinds of calls, in a server and a client of a few lines each."""
