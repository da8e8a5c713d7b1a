package lease

import (
	"maps"
	"slices"
)

// Ticked is what Tick gives.
type Ticked struct {
	Expired []Lease  // leases that ran out
	Check   []string // keys to check now
	Forget  []string // keys whose KEKs to forget: no lease and no fresh answer speaks for keeping them
	Gone    []string // keys of which nobody has asked for so long that nothing need be remembered
}

// Tick lets time pass.
func (m *Machine) Tick(now Instant) Ticked {
	var t Ticked
	for _, name := range slices.Sorted(maps.Keys(m.keys)) {
		k := m.keys[name]
		m.settle(now, k)
		t.Expired = append(t.Expired, m.expire(now, k)...)
		if m.due(now, k) {
			t.Check = append(t.Check, name)
		}
		if len(k.leases) > 0 {
			continue
		}
		if !k.forgot && now-k.good >= m.cfg.Idle {
			t.Forget = append(t.Forget, name)
			k.forgot = true
		}
		if k.forgot && !k.held && now-k.lastUsed >= m.cfg.Idle {
			t.Gone = append(t.Gone, name)
			delete(m.keys, name)
		}
	}
	sortLeases(t.Expired)
	return t
}

func (m *Machine) expire(now Instant, k *key) (expired []Lease) {
	for id, l := range k.leases {
		if now < l.End {
			continue
		}
		expired = append(expired, *l)
		delete(m.leases, id)
		delete(k.leases, id)
		if k.state == StateUnreachable {
			k.lost[l.Node] = false
		}
	}
	return expired
}

// Due tells whether a key is to be checked now, without being asked for: one with leases before the
// last success gets too old, one that cannot be used while somebody waits for it.
func (m *Machine) Due(now Instant, name string) bool {
	k := m.keys[name]
	return k != nil && m.due(now, k)
}

func (m *Machine) due(now Instant, k *key) bool {
	wanted := len(k.leases) > 0 || (k.failed() || k.denied) && now-k.lastUsed < m.cfg.Idle
	if !wanted || k.held {
		return false
	}
	if k.last == OK {
		return now-k.good >= m.cfg.CheckInterval-m.cfg.Lead && now-k.ended >= m.cfg.RetryGap
	}
	return k.last == Never || now-k.ended >= m.gap(now, k)
}
