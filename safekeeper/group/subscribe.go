package group

import "sync"

// A Subscription gets a token whenever its branch may have changed.
type Subscription struct{ C chan struct{} }

type subscribers struct {
	sync.Mutex
	byBranch map[uint32]map[*Subscription]struct{}
}

// Subscribe begins a subscription to a branch. cancel ends it.
func (g *Group) Subscribe(branch uint32) (sub *Subscription, cancel func()) {
	sub = &Subscription{C: make(chan struct{}, 1)}
	s := &g.subs
	s.Lock()
	defer s.Unlock()
	if s.byBranch[branch] == nil {
		s.byBranch[branch] = map[*Subscription]struct{}{}
	}
	s.byBranch[branch][sub] = struct{}{}
	return sub, func() {
		s.Lock()
		defer s.Unlock()
		delete(s.byBranch[branch], sub)
		if len(s.byBranch[branch]) == 0 {
			delete(s.byBranch, branch)
		}
	}
}

func (s *subscribers) notify(branch uint32) {
	s.Lock()
	defer s.Unlock()
	for sub := range s.byBranch[branch] {
		poke(sub.C)
	}
}

func (s *subscribers) notifyAll() {
	s.Lock()
	defer s.Unlock()
	for _, subs := range s.byBranch {
		for sub := range subs {
			poke(sub.C)
		}
	}
}
