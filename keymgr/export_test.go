package keymgr

// Announce tells all watchers of a key.
func (s *Server) Announce(key string) { s.announce(parseKeyID(key)) }

// Watchers counts them.
func (s *Server) Watchers() int {
	s.watchers.Lock()
	defer s.watchers.Unlock()
	return len(s.watchers.all)
}
