package oracle

// rareRecords makes kinds and variants of records that ordinary use makes seldom or by chance.
func rareRecords(c *session) {
	speculationFails(c)
	tablespaces(c)
	preparedEnds(c)
	commitTimestamps(c)
}

// speculationFails has a speculative insertion find its conflict only after the row is there,
// so that it is deleted again: its index's function lies the second time that it is called.
func speculationFails(c *session) {
	c.exec(
		"CREATE SEQUENCE lies",
		`CREATE FUNCTION lie(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS
			$$ BEGIN RETURN CASE WHEN n = 1 AND nextval('lies') = 2 THEN 0 ELSE n END; END $$`,
		"CREATE TABLE lied (n int, wide text)", "ALTER TABLE lied ALTER wide SET STORAGE EXTERNAL",
		"CREATE UNIQUE INDEX lied_n ON lied (lie(n))",
		"INSERT INTO lied VALUES (0, 'first')",
		"INSERT INTO lied SELECT 1, repeat('elsewhere', 1000) ON CONFLICT DO NOTHING",
		"VACUUM lied",
	)
	if calls := c.rows("SELECT last_value FROM lies")[0][0]; calls != "4" {
		c.t.Errorf("the index's function was called %s times for two attempts to insert", calls)
	}
}

// tablespaces are refused by computes; their records are not.
func tablespaces(c *session) {
	c.exec(
		"SET allow_in_place_tablespaces = on", "CREATE TABLESPACE inplace LOCATION ''", "RESET allow_in_place_tablespaces",
		"CREATE TABLE elsewhere (a int PRIMARY KEY) TABLESPACE inplace", "INSERT INTO elsewhere SELECT generate_series(1, 300)",
		"ALTER TABLE elsewhere SET TABLESPACE pg_default", "CREATE INDEX elsewhere_i ON elsewhere (a) TABLESPACE inplace", "DROP INDEX elsewhere_i",
		"CREATE DATABASE moved", "ALTER DATABASE moved SET TABLESPACE inplace", "ALTER DATABASE moved SET TABLESPACE pg_default",
		"DROP TABLESPACE inplace",
	)
}

// preparedEnds ends prepared transactions with all that such a record can have: logical
// WAL adds the name, a replication origin its progress.
func preparedEnds(c *session) {
	c.exec("CREATE TABLE ends (a int)", "SELECT pg_replication_origin_create('ends')", "SELECT pg_replication_origin_session_setup('ends')")
	for _, end := range []string{"COMMIT", "ROLLBACK"} {
		c.exec(
			"CREATE TABLE ended (a int PRIMARY KEY)",
			"BEGIN", "SELECT pg_replication_origin_xact_setup('0/345678', '2024-03-04 05:06:07+00')",
			"INSERT INTO ends VALUES (1)", "SAVEPOINT a", "INSERT INTO ends VALUES (2)", "CREATE TABLE made (a int PRIMARY KEY)", "DROP TABLE ended",
			"PREPARE TRANSACTION 'with all'",
			end+" PREPARED 'with all'",
			"DROP TABLE IF EXISTS made, ended",
		)
	}
	c.exec("SELECT pg_replication_origin_session_reset()", "SELECT pg_replication_origin_drop('ends')")
}

// commitTimestamps takes xids for more than a segment of pg_commit_ts, so that the first can
// go when all is frozen. Temporary rows make no WAL.
func commitTimestamps(c *session) {
	c.exec("CREATE TEMP TABLE taken (a int)",
		`DO $$ BEGIN
			FOR i IN 1..27000 LOOP
				BEGIN INSERT INTO taken VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END;
			END LOOP;
		END $$`,
		"DROP TABLE taken")
}
