"""The subcommands of `whalepod`."""
