package keymgr

import (
	"context"
	"testing"
)

// A thousand keys that are revoked at once are one more scrub, or two, and each is followed by one that began after it.
func TestScrubsAreShared(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	began, goOn := make(chan struct{}), make(chan struct{})
	s := &Server{ctx: ctx, dirty: make(chan struct{}, 1)}
	s.cfg.scrub = func() {
		began <- struct{}{}
		<-goOn
	}
	s.wg.Add(1)
	go s.keepScrubbed()
	s.scrub()
	<-began
	for range 1000 { // none of them waits, while a scrub is at work that may have passed what they leave
		s.scrub()
	}
	goOn <- struct{}{}
	<-began
	if len(s.dirty) != 0 {
		t.Error("a thousand calls are more than one scrub")
	}
	stop()
	goOn <- struct{}{}
	s.wg.Wait()
}
