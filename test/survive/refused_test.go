package survive

import (
	"strings"
	"testing"
)

// What would not survive is refused, and what keeps Postgres from starting can be taken back.
func TestWhatIsRefused(t *testing.T) {
	w := newWorld(t, nil)
	err := w.c.Target().Exec(w.ctx, "SET allow_in_place_tablespaces = on", "CREATE TABLESPACE inside LOCATION ''")
	if err == nil || !strings.Contains(err.Error(), "Operation not supported") {
		t.Errorf("CREATE TABLESPACE in place: %v; want that it is refused", err)
	}
	w.want("tablespaces", "2", "SELECT count(*) FROM pg_tablespace")

	w.exec("ALTER SYSTEM SET work_mem = '7MB'", "ALTER SYSTEM SET shared_preload_libraries = 'nonsense'")
	if _, err := w.c.CLI(w.ctx, "endpoint", "kill"); err != nil {
		t.Fatal(err)
	}
	_, err = w.c.CLI(w.ctx, "endpoint", "start")
	for _, part := range []string{"shared_preload_libraries, which was set by ALTER SYSTEM", "holdfast endpoint start --reset-setting"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Fatalf("a start with a library that is not there: %v; want it to say %q", err, part)
		}
	}
	if _, err := w.c.CLI(w.ctx, "endpoint", "start", "--reset-setting", "shared_preload_libraries"); err != nil {
		t.Fatal(err)
	}
	const both = "SELECT current_setting('work_mem'), current_setting('shared_preload_libraries')"
	w.want("settings after one was reset", "7MB ", both)
	if _, err := w.c.CLI(w.ctx, "endpoint", "start", "--reset-setting", "all"); err == nil || !strings.Contains(err.Error(), "ALTER SYSTEM RESET") {
		t.Errorf("resetting a setting of an endpoint that runs: %v; want it to say how", err)
	}
	w.renew("kill")
	w.want("settings on the next server", "7MB ", both)
}
