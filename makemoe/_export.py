"""What nbdev does to a cell on its way from a lesson into the package (see pyproject.toml)."""


def strip_solution_markers(cell):
    "Drop nbgrader's two marker lines, so that the exported module is plain code."
    markers = "### BEGIN SOLUTION", "### END SOLUTION"
    if cell.cell_type == "code":
        lines = cell.source.splitlines(keepends=True)
        cell.set_source("".join(line for line in lines if line.strip() not in markers))
