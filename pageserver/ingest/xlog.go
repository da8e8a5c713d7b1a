package ingest

import (
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Record kinds of the XLOG resource manager (pg_control.h).
const (
	xlogCheckpointShutdown  = 0x00
	xlogCheckpointOnline    = 0x10
	xlogNoop                = 0x20
	xlogNextOid             = 0x30
	xlogSwitch              = 0x40
	xlogBackupEnd           = 0x50
	xlogParameterChange     = 0x60
	xlogRestorePoint        = 0x70
	xlogFPWChange           = 0x80
	xlogEndOfRecovery       = 0x90
	xlogFPIForHint          = 0xA0
	xlogFPI                 = 0xB0
	xlogOverwriteContRecord = 0xD0
)

// xlog is xlog_redo.
func (c *Core) xlog() error {
	f, cp := c.main(), c.state.checkPoint()
	switch c.rec.Info & infoMask {
	case xlogFPI, xlogFPIForHint:
		return c.blocks()
	case xlogNextOid:
		oid := f.oid()
		if f.bad {
			return errShort
		}
		cp.NextOid = oid
	case xlogFPWChange:
		on := f.u8() != 0
		if f.bad {
			return errShort
		}
		cp.FullPageWrites = on
	case xlogCheckpointShutdown, xlogCheckpointOnline:
		return c.checkpoint()
	case xlogParameterChange:
		return c.parameterChange()
	case xlogEndOfRecovery:
		f.u64() // end_time
		tli := f.u32()
		return c.checkTimeline(tli, f.err())
	case xlogNoop, xlogSwitch, xlogBackupEnd, xlogRestorePoint, xlogOverwriteContRecord:
	default:
		return fmt.Errorf("unknown kind %#02x", c.rec.Info&infoMask)
	}
	return nil
}

func (c *Core) checkTimeline(tli uint32, err error) error {
	if err == nil && tli != pg.Timeline {
		err = fmt.Errorf("PostgreSQL timeline %d: a branch has only timeline %d", tli, pg.Timeline)
	}
	return err
}

// checkpoint believes a shutdown checkpoint's counters exactly, and takes those of an online
// one, which are from its start, as minima.
func (c *Core) checkpoint() error {
	seen, err := pg.ParseCheckPoint(c.rec.MainData)
	if err != nil {
		return err
	}
	if err := c.checkTimeline(seen.TimelineID, nil); err != nil {
		return err
	}
	cp := c.state.checkPoint()
	shutdown := c.rec.Info&infoMask == xlogCheckpointShutdown
	if shutdown {
		cp.NextXid, cp.NextOid = seen.NextXid, seen.NextOid
		cp.NextMulti, cp.NextMultiOffset = seen.NextMulti, seen.NextMultiOffset
		cp.OldestMulti, cp.OldestMultiDB = seen.OldestMulti, seen.OldestMultiDB
	} else {
		cp.NextXid = max(cp.NextXid, seen.NextXid)
		c.state.advanceMulti(seen.NextMulti, seen.NextMultiOffset)
		c.state.advanceOldestMulti(seen.OldestMulti, seen.OldestMultiDB)
	}
	if shutdown || xidPrecedes(cp.OldestXid, seen.OldestXid) {
		cp.OldestXid, cp.OldestXidDB = seen.OldestXid, seen.OldestXidDB
	}
	cp.Time, cp.FullPageWrites = seen.Time, seen.FullPageWrites
	c.state.Control.Time = seen.Time
	return nil
}

func (c *Core) parameterChange() error {
	f, ctl := c.main(), &c.state.Control
	connections, workers, senders, prepared, locks, level := f.u32(), f.u32(), f.u32(), f.u32(), f.u32(), f.u32()
	hints, commitTS := f.u8() != 0, f.u8() != 0
	if f.bad {
		return errShort
	}
	ctl.MaxConnections, ctl.MaxWorkerProcesses, ctl.MaxWALSenders = connections, workers, senders
	ctl.MaxPreparedXacts, ctl.MaxLocksPerXact, ctl.WALLevel, ctl.WALLogHints = prepared, locks, level, hints
	was := ctl.TrackCommitTS
	ctl.TrackCommitTS = commitTS
	switch {
	case commitTS && !was:
		return c.activateCommitTS()
	case was && !commitTS:
		return c.deactivateCommitTS()
	}
	return nil
}

// replOrigin is replorigin_redo.
func (c *Core) replOrigin() error {
	const set, drop = 0x00, 0x10
	f := c.main()
	switch c.rec.Info & infoMask {
	case set:
		remote, origin, force := pg.LSN(f.u64()), f.u16(), f.u8() != 0
		if f.bad {
			return errShort
		}
		c.state.advanceOrigin(origin, remote, force)
	case drop:
		origin := f.u16()
		if f.bad {
			return errShort
		}
		delete(c.state.Origins, origin)
	default:
		return fmt.Errorf("unknown kind %#02x", c.rec.Info&infoMask)
	}
	return nil
}
