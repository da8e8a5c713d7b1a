package keymgr

// Announce tells all watchers of a key.
func (s *Server) Announce(key string) { s.announce(parseKeyID(key)) }

// Watchers counts them.
func (s *Server) Watchers() int {
	s.watchers.Lock()
	defer s.watchers.Unlock()
	return len(s.watchers.all)
}

// KEKs counts the versions of a key's KEK that are in memory.
func (s *Server) KEKs(key string) int {
	k := s.key(parseKeyID(key))
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.mu.keks)
}
