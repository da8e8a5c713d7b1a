package timeline

import (
	"context"
	"fmt"
	"os"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// Delete deletes a branch that no server has open: the manifest first, from when on there is no branch, then its
// layers and their local copies. It needs no key, and may be called again.
func Delete(ctx context.Context, cfg Config) error {
	if err := cfg.Store.Delete(ctx, cfg.manifestKey()); err != nil {
		return fmt.Errorf("deleting manifest %s: %w", cfg.manifestKey(), err)
	}
	var keys []string
	err := cfg.Store.List(ctx, cfg.layerPrefix(), func(i blob.Info) error {
		keys = append(keys, i.Key)
		return nil
	})
	if err != nil {
		return fmt.Errorf("listing layers below %s: %w", cfg.layerPrefix(), err)
	}
	for _, key := range keys {
		if err := cfg.Store.Delete(ctx, key); err != nil {
			return fmt.Errorf("deleting layer %s: %w", key, err)
		}
	}
	if cfg.Dir == "" {
		return nil
	}
	return os.RemoveAll(cfg.Dir)
}
