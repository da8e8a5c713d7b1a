package lease

// Drop forgets a key that was destroyed, and returns the leases that this ended.
func (m *Machine) Drop(name string) (ended []Lease) {
	k := m.keys[name]
	if k == nil {
		return nil
	}
	ended = m.endLeases(k)
	delete(m.keys, name)
	return ended
}
