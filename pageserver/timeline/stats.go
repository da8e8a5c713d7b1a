package timeline

// Stats tells how large a timeline is.
type Stats struct {
	Layers      int   // files in the manifest
	LayerBytes  int64 // their sealed bytes
	MemoryBytes int64 // versions that are in no durable layer yet
}

// Stats gives the timeline's present size.
func (t *Timeline) Stats() Stats {
	t.mu.Lock()
	m := t.mu.manifest
	tables := append([]*memtable{t.mu.view.open}, t.mu.view.frozen...)
	t.mu.Unlock()
	s := Stats{Layers: len(m.Layers)}
	for i := range m.Layers {
		s.LayerBytes += m.Layers[i].Size
	}
	for _, table := range tables {
		s.MemoryBytes += table.size()
	}
	return s
}
