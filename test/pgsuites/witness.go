package main

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/witness"
)

// starts is at how many LSNs of a suite, at most, a start is compared with recovery; sampleEvery is how
// often an LSN is noted, from which those are drawn.
const (
	starts      = 3
	sampleEvery = 2 * time.Second
)

// observer compares the pageserver with a stock server that recovers the same WAL, after
// each suite.
type observer struct {
	c   *cluster.Cluster
	w   *witness.Witness
	rng *rand.Rand
}

// observe begins with the branch as it was made, before anything ran.
func observe(ctx context.Context, c *cluster.Cluster, dir string, seed uint64) (*observer, error) {
	st, err := c.Status(ctx)
	if err != nil {
		return nil, err
	}
	if len(st.Endpoints) != 1 || len(st.Safekeepers) == 0 || len(st.Safekeepers[0].Branches) != 1 {
		return nil, fmt.Errorf("the cluster has %d endpoints and %d safekeepers that answer", len(st.Endpoints), len(st.Safekeepers))
	}
	start := st.Safekeepers[0].Branches[0].StartLSN
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	cfg := witness.Config{Dir: dir, Project: st.Endpoints[0].Project, Branch: st.Endpoints[0].Branch, Keymgr: c.Socket(cluster.Keymgr),
		Pageserver: c.Socket(cluster.Pageserver), Settings: settings, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	for id := 1; id <= 3; id++ {
		cfg.Safekeepers = append(cfg.Safekeepers, c.Socket(cluster.Safekeeper(id)))
	}
	w, err := witness.New(ctx, cfg, start)
	if err != nil {
		return nil, err
	}
	fmt.Printf("LSNs at which starts are compared with recovery are drawn from seed %d\n", seed)
	return &observer{c: c, w: w, rng: rand.New(rand.NewPCG(seed, 0))}, nil
}

func (o *observer) close() error { return o.w.Close() }

// during runs a suite, stops the endpoint in order, compares, and starts it again.
func (o *observer) during(ctx context.Context, name string, suite func()) (failed []string) {
	found := o.sample(ctx, suite)
	fail := func(err error) []string { return append(failed, fmt.Sprintf("%s: the witness: %v", name, err)) }
	if _, err := o.c.CLI(ctx, "endpoint", "stop"); err != nil {
		return fail(err)
	}
	defer func() {
		if _, err := o.c.CLI(ctx, "endpoint", "start"); err != nil {
			failed = fail(err)
		}
	}()
	end, err := waitIngested(ctx, o.c, func([]cluster.RedoCheck) {})
	if err != nil {
		return fail(err)
	}
	o.rng.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	found = found[:min(len(found), starts)]
	slices.Sort(found)
	for _, lsn := range found {
		r, err := o.w.AtStart(ctx, lsn)
		if err != nil {
			return fail(err)
		}
		failed = append(failed, told(name, "start", r)...)
	}
	r, err := o.w.AtShutdown(ctx, end)
	if err != nil {
		return fail(err)
	}
	return append(failed, told(name, "shutdown", r)...)
}

func told(name, what string, r *witness.Result) []string {
	fmt.Printf("    %s at %v: recovered in %.1fs; %v\n", what, r.LSN, r.Recovery.Seconds(), r.Counts)
	if len(r.Problems) == 0 {
		return nil
	}
	for _, p := range r.Problems[:min(len(r.Problems), 20)] {
		fmt.Println("    ", p)
	}
	return []string{fmt.Sprintf("%s: at %v the pageserver and stock recovery disagree %d times, first: %s", name, r.LSN, len(r.Problems), r.Problems[0])}
}

// sample runs fn and notes LSNs at which an endpoint could have started meanwhile.
func (o *observer) sample(ctx context.Context, fn func()) (found []pg.LSN) {
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if st, err := o.c.Status(ctx); err == nil && len(st.Pageserver.Branches) == 1 {
				lsn := st.Pageserver.Branches[0].IngestedLSN
				if lsn != 0 && !slices.Contains(found, lsn) { // 0 while it attaches
					found = append(found, lsn)
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(sampleEvery):
			}
		}
	})
	fn()
	stop()
	wg.Wait()
	return found
}

// waitIngested waits until the pageserver has ingested all WAL, and gives its end.
func waitIngested(ctx context.Context, c *cluster.Cluster, then func([]cluster.RedoCheck)) (pg.LSN, error) {
	for said := ""; ; {
		st, err := c.Status(ctx)
		if err != nil {
			return 0, err
		}
		if len(st.Pageserver.Branches) != 1 {
			return 0, fmt.Errorf("the pageserver has %d branches, want 1", len(st.Pageserver.Branches))
		}
		b := st.Pageserver.Branches[0]
		have, end := b.IngestedLSN, committed(st)
		if end > 0 && have >= end {
			then(b.RedoChecks)
			return end, nil
		}
		if now := fmt.Sprintf("the pageserver has ingested %v of %v %s", have, end, b.Error); time.Now().Second()%30 == 0 && now != said {
			fmt.Println(now)
			said = now
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// committed is the end of the branch's WAL, as the safekeeper knows that is furthest; 0 if none
// answers.
func committed(st *cluster.Status) (end pg.LSN) {
	for _, sk := range st.Safekeepers {
		for _, b := range sk.Branches {
			end = max(end, b.EndLSN)
		}
	}
	return end
}
