"""The commands of ``cascade-det``.

``main`` dispatches. A command's module holds its arguments and ``main(argv, prog)``; it imports
what is heavy inside functions, so that ``--help`` and argument errors come at once.
"""
