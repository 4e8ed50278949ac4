"""`dynamize transforms` and `dynamize recipes`: what there is to use."""

from typing import Annotated

import typer

from dynamize.cli.console import show, show_json
from dynamize.cli.options import AsJson

recipes = typer.Typer(
    no_args_is_help=True,
    help="List the built-in recipes, show one, or print the schema of all.\n\nExample: dynamize recipes list",
)


def transforms(
    name: Annotated[str | None, typer.Argument(help="One of them, with its fields.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the transforms, or show the fields of one; with --json as JSON schema.

    Example: dynamize transforms exits
    """
    from dynamize.cli import fields
    from dynamize.transform import find_transform, registered

    if name is None and as_json:
        show_json({one: cls.model_json_schema(by_alias=True) for one, cls in sorted(registered().items())})
    elif name is None:
        show(fields.transforms(registered()))
    elif as_json:
        show_json(find_transform(name).model_json_schema(by_alias=True))
    else:
        show(fields.transform(find_transform(name)))


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the built-in recipes.

    Example: dynamize recipes list
    """
    from dynamize.cli import tables
    from dynamize.recipes import builtin_recipes, describe

    found = {name: describe(file) for name, file in builtin_recipes().items()}
    if as_json:
        show_json(found)
    else:
        show(tables.named(found, "recipe"))


@recipes.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A built-in recipe, or a file.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print a recipe, to be saved and changed.

    Example: dynamize recipes show quickstart > mine.yaml
    """
    from dynamize.recipes import find_recipe, read_recipe

    if as_json:
        show_json(read_recipe(name))
    else:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("schema")
def show_schema() -> None:
    """Print the JSON schema of recipes, by which an editor completes and checks them.

    Example: dynamize recipes schema > recipe.schema.json
    """
    from dynamize.recipe import schema

    show_json(schema())
