c = get_config()  # noqa: F821
c.Execute.timeout = 600  # seconds for a cell when a lesson is validated: by default too few for a cell that trains
