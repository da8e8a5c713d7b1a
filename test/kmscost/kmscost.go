// Package kmscost tells how many calls to the customers' KMSes a key manager makes, and what they cost at
// list price: it runs the real lease machine, in virtual time, over many keys whose nodes come and go.
package kmscost

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// Mix is how the keys are used.
type Mix struct {
	Name string
	// Awake is the part of the keys that nodes hold leases on.
	Awake float64
	// Burst and Every: an awake key is used for Burst out of Every; zero: all the time.
	Burst, Every time.Duration
}

// Mixes are the ones of the documentation.
var Mixes = []Mix{
	{Name: "all in use", Awake: 1},
	{Name: "one in ten in use, the others without a lease", Awake: 0.1},
	{Name: "each in use for 5 minutes an hour", Awake: 1, Burst: 5 * time.Minute, Every: time.Hour},
}

// Times are those that a key manager has by default, as its Config says.
type Times struct {
	Lease lease.Config
	Tick  time.Duration // how often the machine is asked what to check
}

// nodesPerKey hold a lease on a key in use: the page server, the leading safekeeper, the endpoint and the manager.
const nodesPerKey = 4

// answerTime is how long the KMS takes.
const answerTime = 20 * time.Millisecond

type node struct {
	key     string
	name    string
	id      string
	renewAt time.Duration
	from    time.Duration // of its burst, within Every
}

// warmUp is not counted: all keys are checked when the simulation begins, which none does in an hour of service.
const warmUp = 10 * time.Second

// Calls simulates span of virtual time, after warmUp, and gives the calls to KMSes in it.
func Calls(t Times, mix Mix, keys int, span time.Duration, seed uint64) (calls int) {
	rng := rand.New(rand.NewPCG(seed, seed))
	m := lease.New(t.Lease)
	nodes := makeNodes(rng, mix, keys)
	ids := 0
	check := func(now time.Duration, key string) {
		if now >= warmUp {
			calls++
		}
		m.CheckResult(now, now+answerTime, key, lease.OK)
	}
	for now := t.Tick; now < span+warmUp; now += t.Tick {
		for _, key := range m.Tick(now).Check {
			check(now, key)
		}
		for _, n := range nodes {
			if n.renewAt > now || !n.inUse(now, mix) {
				continue
			}
			ids++
			ask := lease.Ask{Key: n.key, Node: n.name, ID: n.id, NewID: fmt.Sprint(ids)}
			d := m.Request(now, ask)
			if d.Kind == lease.Check {
				check(now, n.key)
				d = m.Request(now+answerTime, ask)
			}
			if d.Kind == lease.Grant {
				n.id, n.renewAt = d.Lease, now+d.TTL/3
			}
		}
	}
	return calls
}

func makeNodes(rng *rand.Rand, mix Mix, keys int) (nodes []*node) {
	for k := range int(float64(keys)*mix.Awake + 0.5) {
		var from time.Duration
		if mix.Every > 0 {
			from = time.Duration(rng.Int64N(int64(mix.Every)))
		}
		for i := range nodesPerKey {
			nodes = append(nodes, &node{key: fmt.Sprint(k), name: fmt.Sprint("node", i), from: from,
				renewAt: time.Duration(rng.Int64N(int64(2 * time.Second)))})
		}
	}
	return nodes
}

func (n *node) inUse(now time.Duration, mix Mix) bool {
	return mix.Every == 0 || (now-n.from+mix.Every)%mix.Every < mix.Burst
}

// Price is what a service asks for. Requests of what is free each month are not taken off.
type Price struct {
	Service string
	Per     float64 // US dollars for 10,000 calls
	Key     float64 // US dollars a month for a key (version)
	Source  string
}

// Prices are the list prices of software-protected keys as they were found; they are the
// customer's to check.
var Prices = []Price{
	{"AWS KMS", 0.03, 1, "https://aws.amazon.com/kms/pricing/"},
	{"Google Cloud KMS (software)", 0.03, 0.06, "https://cloud.google.com/kms/pricing"},
	{"Azure Key Vault (RSA 2048, software)", 0.03, 0, "https://azure.microsoft.com/pricing/details/key-vault/"},
}

const hoursAMonth = 730

// Month is what calls an hour cost a month.
func (p Price) Month(callsAnHour float64) float64 { return callsAnHour * hoursAMonth / 10_000 * p.Per }
