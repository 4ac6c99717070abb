"""How ranks talk: the Communicator protocol, its transports, and connect()."""

from dhf.comm.communicator import Communicator, Pending
from dhf.comm.connect import connect
from dhf.comm.mpi import Mpi
from dhf.comm.serial import Serial
from dhf.comm.torch_distributed import TorchDistributed

__all__ = ["Communicator", "Mpi", "Pending", "Serial", "TorchDistributed", "connect"]
