package smoke

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// Any role can write a record of any size, and messages that look like the compute's own. Neither
// ends the endpoint, nor changes what the next one starts with.
func TestWhatAnyRoleCanWrite(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	c := start(t, ctx, nil)
	target := c.Target()
	do := func(statements ...string) {
		t.Helper()
		for _, s := range statements {
			if err := target.Exec(ctx, s); err != nil {
				t.Fatalf("%.80s: %v", s, err)
			}
		}
	}
	do("CREATE ROLE anybody", "CREATE TABLE kept (v int)", "ALTER SYSTEM SET work_mem = '7MB'")
	message := func(mib int) string {
		return fmt.Sprintf("SET ROLE anybody; SELECT length(pg_logical_emit_message(true, 'large', repeat('0123456789abcdef', %d))::text)", mib<<16)
	}
	pid := ask(ctx, target, "SELECT pg_postmaster_start_time()")
	do(message(40), "INSERT INTO kept VALUES (1)", message(100), "INSERT INTO kept VALUES (2)", message(17))

	// 100,000 of each kind, each of which cost a call and a write to the audit log once.
	for _, prefix := range []string{"holdfast.aux", "holdfast.auxkey"} {
		do(fmt.Sprintf("SET ROLE anybody; SELECT count(pg_logical_emit_message(false, '%s', 'HFSEAL01 and more, ' || i)) FROM generate_series(1, 100000) i", prefix))
	}
	begun := time.Now()
	do("ALTER SYSTEM SET work_mem = '9MB'", "INSERT INTO kept VALUES (3)")
	if got := ask(ctx, target, "SELECT pg_postmaster_start_time()"); got != pid {
		t.Error("the server started anew")
	}
	renew(t, ctx, c)
	t.Logf("settings, a row and a new endpoint behind 200,000 forged messages: %v", time.Since(begun))
	target = c.Target()
	if got := ask(ctx, target, "SELECT sum(v) || ' ' || current_setting('work_mem') FROM kept"); got != "6 9MB" {
		t.Errorf("after: %q", got)
	}
	do(message(40), "INSERT INTO kept VALUES (4)")
}
